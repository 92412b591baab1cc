"""The models: D-ReLU and its caps, how a timm architecture gets them, and a model as a folder of files."""
