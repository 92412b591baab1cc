"""The models: D-ReLU and its caps, how a timm architecture gets them, nets that timm lacks, a model as a folder."""

# Registration, which timm's import starts, needs the modules here. If one of them were the first to import timm, as
# when a pickled model is loaded, registration would find that module partly imported.
import timm  # noqa: F401
