"""The command line, recipes, paired statistics, figures and reports. Nothing imports this package."""
