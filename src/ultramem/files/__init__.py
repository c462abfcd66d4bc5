"""Files written whole or not at all, directories made whole, and locks."""
