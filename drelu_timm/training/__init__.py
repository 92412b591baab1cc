"""What `drelu-timm train` is made of: its flags, objectives, one step, the loop around it, and what it writes."""
