"""One reader for the pictures that users bring: any format to 8-bit sRGB or grey."""
