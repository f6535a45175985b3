"""The platform that runs the real SGLang engine on a CPU, and what it stands in for."""
