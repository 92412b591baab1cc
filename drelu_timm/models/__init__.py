"""Models: D-ReLU and its caps, its placement in timm's architectures, architectures that timm lacks, model folders."""

# The import of timm starts the registration, which needs the modules here. If one of them were the first to import
# timm, for example to load a pickled model, the registration would find that module partly imported.
import timm  # noqa: F401
