"""Where do runs run? Starts the jobs of a suite; knows configurations and run folders, never the command line."""
