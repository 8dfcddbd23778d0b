"""The public projects' files, one module a family."""
