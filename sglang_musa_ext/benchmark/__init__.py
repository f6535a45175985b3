"""The benchmark: this package beside SGLang's own attention backends, in turns, on one device."""
