"""Other projects' models and engines, running on this library's attention."""
