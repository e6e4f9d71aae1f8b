"""What a conversion will do, decided from config.json, the source's headers and the scheme, before a byte is read."""
