"""What `drelu-timm report` is made of: result files gathered, averaged, tested, and shown beside the paper's."""
