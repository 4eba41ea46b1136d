"""`fewstep gallery`: figures from real runs, as pictures and as one page. One module per figure."""
