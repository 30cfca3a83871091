"""Networks: from stacked observations to action logits and values."""
