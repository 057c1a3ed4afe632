"""Drop-in modules under the names that engines import today."""
