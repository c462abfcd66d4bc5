"""From YAML to configuration dataclasses and back, and the check of their values' types."""
