"""What a person reads of a finished run: the page, the model card and the checklist"""
