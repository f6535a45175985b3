"""The validation kit: the stack installed here beside float64 attention and SGLang's own."""
