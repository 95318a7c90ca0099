"""What people read: pages, charts, pictures, model cards."""
