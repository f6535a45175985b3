"""The benchmark: this package beside SGLang's own attention backends, taking turns on one device."""
