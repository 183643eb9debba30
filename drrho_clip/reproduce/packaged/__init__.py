"""Pictures with captions that install as packages: places of files, readers, concepts, and pools of features."""
