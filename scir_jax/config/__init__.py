"""The settings: typed sections, YAML files, command lines, and what contradicts itself."""
