"""The commands of `dist-train`, a file for each kind of thing that a person does."""
