"""Numbers recorded from other libraries' real code, and the scripts that recorded them."""
