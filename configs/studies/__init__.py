"""Studies that ship with glann; `glann tune NAME`."""
