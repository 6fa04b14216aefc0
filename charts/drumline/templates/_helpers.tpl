{{- /* What all names begin with. A Service's name begins with a letter, so a release called 7 becomes drumline-7. */}}
{{- define "drumline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := .Release.Name | replace "." "-" -}}
{{- if not (contains .Chart.Name $name) -}}
{{- $name = printf "%s-%s" $name .Chart.Name -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- $name = printf "%s-%s" .Chart.Name $name -}}
{{- end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* The Deployment and what belongs to it. */}}
{{- define "drumline.operator" -}}
{{- include "drumline.fullname" . }}-operator
{{- end -}}

{{- define "drumline.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "drumline.operator" .) -}}
{{- end -}}

{{- /* Of everything; the operator's own pods and Service add their name. */}}
{{- define "drumline.labels" -}}
app.kubernetes.io/part-of: drumline
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* The NetworkPolicies of apps know the operator by its name, so no value changes it. */}}
{{- define "drumline.selector" -}}
app.kubernetes.io/name: drumline-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Arguments: the root, and an image of the values. Empty without a repository. */}}
{{- define "drumline.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- with $image.repository }}{{ . }}@{{ $image.digest }}{{ end -}}
{{- else -}}
{{- with $image.repository }}{{ . }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* Pod Security "restricted", for pods of ours. */}}
{{- define "drumline.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "drumline.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Argument: the weight, which orders the parts of the test. */}}
{{- define "drumline.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
