"""What is said of images: tokenizers, text encoders and their weights, features of captions."""
