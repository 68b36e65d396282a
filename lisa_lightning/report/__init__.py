"""What a person reads at the end: the page, the plots, the table in the terminal."""

from lisa_lightning.report.page import page as page
from lisa_lightning.report.page import samples as samples
from lisa_lightning.report.terminal import terminal as terminal
