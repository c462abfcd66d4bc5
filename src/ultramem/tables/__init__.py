"""Where rows live and how they learn."""
