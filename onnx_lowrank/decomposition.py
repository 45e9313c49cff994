"""Reserved for the room of this name; see CONTRIBUTING."""
