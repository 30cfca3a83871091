"""Workers to server: whatever steps environments, behind one protocol."""
