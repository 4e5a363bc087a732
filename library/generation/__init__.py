"""Pictures: from prompt lines to requests, through samplers and models, to files that say how they were made."""
