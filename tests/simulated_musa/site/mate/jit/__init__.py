"""Where MATE compiles kernels at their first use; nothing is compiled here."""
