"""What `cells` does with one bilinear cell: surface.py has its logits, pixels.py its labels, gradient.py its end."""
