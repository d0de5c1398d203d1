"""Pages with tables and figures from what runs have written; knows neither models nor training."""
