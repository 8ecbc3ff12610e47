"""What a save writes, and when a signal asks for one."""
