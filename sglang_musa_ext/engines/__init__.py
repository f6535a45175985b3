"""SGLang engines in processes of their own, for the validation kit and the benchmark."""
