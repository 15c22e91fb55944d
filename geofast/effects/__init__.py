"""What edits change: effect, damage, controls, and where to edit."""
