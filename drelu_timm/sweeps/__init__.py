"""What `drelu-timm sweep` is made of: grids, their cells, what these cost, and where and when they run."""
