"""Parts of `drelu-timm report`: reading runs, averaging over seeds, statistics, tables and figures."""
