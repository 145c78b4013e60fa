"""What people read: model cards now, tables and plots with the commands that make them."""
