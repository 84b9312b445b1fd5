"""Reading, writing and protecting the metadata of an image."""
