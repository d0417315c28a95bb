package iptables

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The lists of the match recent in the network namespace of this thread, and how
// many clients the kernel keeps on each.
const (
	recentLists = "/proc/thread-self/net/xt_recent"
	recentLimit = "/sys/module/xt_recent/parameters/ip_list_tot"
)

// FullAffinityLists counts the endpoints whose list of clients is full: one more
// client with session affinity, and the client that was quiet for longest may get
// another endpoint. It reads every list, a few kilobytes each.
func FullAffinityLists() (full int, err error) {
	text, err := os.ReadFile(recentLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // without the module there is no list
	}
	limit, parseErr := strconv.Atoi(strings.TrimSpace(string(text)))
	if err = errors.Join(err, parseErr); err != nil {
		return 0, fmt.Errorf("reading how many clients of session affinity the kernel keeps: %w", err)
	}
	lists, err := filepath.Glob(filepath.Join(recentLists, endpointPrefix+"*"))
	if err != nil {
		return 0, err
	}
	for _, list := range lists {
		clients, err := countLines(list)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its endpoint has gone meanwhile
		}
		if err != nil {
			return 0, fmt.Errorf("counting the clients of session affinity: %w", err)
		}
		if clients >= limit {
			full++
		}
	}
	return full, nil
}

func countLines(path string) (n int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		n++
	}
	return n, lines.Err()
}
