"""The C++ kernels of several chapters, and what builds them where they run."""
