"""A teacher's targets on disk: written once at any layout, read at any other, by as many students as one likes."""
