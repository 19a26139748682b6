"""Facts taught to a pretrained model: what is recalled, what is lost, and what the gate opens for."""
