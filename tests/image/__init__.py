"""The images: their Dockerfiles, and a script that executes one without a container engine."""
