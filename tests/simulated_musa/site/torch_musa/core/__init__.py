"""Where the vendor's backend keeps streams and start-up."""
