"""What `copresence` does, one module for each command; a field engineer's are in device/field/."""
