"""The rank processes: their parent (the nursery), their process group, their request loop."""
