"""What goes between machines: one gRPC stream of messages per worker host."""
