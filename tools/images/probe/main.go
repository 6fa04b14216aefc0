// probe answers questions about the pod it runs in, and asks other pods: what the cluster's own tests look through.
//
//	GET /            the host name
//	GET /env?name=   the value of an environment variable
//	GET /files?of=   the names in a directory, one per line
//	GET /lookup?name= the IPv4 addresses of a name, one per line
//	GET /get?url=    what another server answers, with its status
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

const limit = 5 * time.Second

func answer(w http.ResponseWriter, lines []string, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	slices.Sort(lines)
	fmt.Fprintln(w, strings.Join(lines, "\n"))
}

func files(w http.ResponseWriter, r *http.Request) {
	entries, err := os.ReadDir(r.FormValue("of"))
	names := make([]string, len(entries))
	for i, entry := range entries {
		names[i] = entry.Name()
	}
	answer(w, names, err)
}

func lookup(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupIP(ctx, "ip4", r.FormValue("name"))
	lines := make([]string, len(addresses))
	for i, address := range addresses {
		lines[i] = address.String()
	}
	answer(w, lines, err)
}

func get(w http.ResponseWriter, r *http.Request) {
	client := http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(r.FormValue("url"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer response.Body.Close()
	w.WriteHeader(response.StatusCode)
	if _, err := io.Copy(w, response.Body); err != nil {
		log.Print(err)
	}
}

func main() {
	listen := flag.String("listen", ":8080", "the address to serve on")
	flag.Parse()
	http.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		name, err := os.Hostname()
		answer(w, []string{name}, err)
	})
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		answer(w, []string{os.Getenv(r.FormValue("name"))}, nil)
	})
	http.HandleFunc("/files", files)
	http.HandleFunc("/lookup", lookup)
	http.HandleFunc("/get", get)
	server := http.Server{Addr: *listen, ReadHeaderTimeout: limit}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		rest, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		_ = server.Shutdown(rest)
	}()
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		log.Fatal(err)
	}
}
