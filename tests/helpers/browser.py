"""A real, headless Chromium through its driver, without any connection but to this machine."""

import contextlib
import tempfile

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
)


@contextlib.contextmanager
def chromium(binary="/usr/bin/chromium", driver="/usr/bin/chromedriver", *flags):
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,860", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield started
        finally:
            started.quit()


class Page:
    """The page as a reader has it: what is visible, clicked and typed."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, path="/"):
        self.driver.get(self.address + path)
        self.until(lambda: self.one("#health").text == "Ready" and self.one("#model").text)

    def fresh(self, path="/"):
        self.driver.get(self.address + "/v1/models")
        self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.open(path)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition, timeout_s=10):
        ignored = (Exception,)  # nodes are replaced while a page draws
        return WebDriverWait(self.driver, timeout_s, 0.05, ignored).until(lambda _: condition())

    def type(self, text, selector="#composer-text"):
        self.one(selector).send_keys(text)

    def ask(self, text):
        self.type(text + "\n")

    def answered(self):
        self.until(lambda: not self.one("#stop").is_displayed() and self.texts("assistant"))

    def texts(self, role):
        return [each.text for each in self.all(f'.message[data-role="{role}"] > .body')]

    def button(self, label, within="body"):
        return self.one(f'{within} button[aria-label="{label}"]')

    def errors(self):
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
