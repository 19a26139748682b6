"""A study of when small models learn to copy from their context, and of the rates and placement that text wants."""
